"""Speed and quality measurements, with their committed results."""
