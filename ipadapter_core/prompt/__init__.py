"""From features to image tokens: one picture or several, faces, files that keep them."""
