"""What the DreamBooth scripts share."""
