"""What fastapi-headroom costs, as ratios against peers measured in the same run."""
