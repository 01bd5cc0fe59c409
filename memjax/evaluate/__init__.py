"""Quality and bytes, side by side."""
