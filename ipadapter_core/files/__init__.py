"""Files of strangers: opened without running code, read within limits, checked before they are believed."""
