"""Model families; each runs alone on one device and declares its sizes."""
