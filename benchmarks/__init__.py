"""What fastapi-headroom costs, beside peers that are measured in the same run."""
