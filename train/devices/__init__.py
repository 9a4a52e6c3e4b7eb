"""One program over many devices and processes."""
