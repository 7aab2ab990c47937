"""Pictures before they are features: read, cut, tiled, disturbed, encoded; faces found in them."""
