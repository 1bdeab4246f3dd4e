"""The paper: interpolant, losses, the training step with its gradient routing, sampling."""
