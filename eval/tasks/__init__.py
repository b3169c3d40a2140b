"""One short file per benchmark."""
