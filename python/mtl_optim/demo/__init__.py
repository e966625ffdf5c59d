"""The demo: images of two handwritten digits, three tasks, one network, several combination methods."""
