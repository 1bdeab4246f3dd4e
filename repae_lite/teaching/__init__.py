"""What notebooks need: the embedded scale, figures, the method's map, explorers."""
