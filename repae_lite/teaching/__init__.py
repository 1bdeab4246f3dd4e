"""What the notebooks need: the embedded scale, figures, the map of the method, and explorers."""
