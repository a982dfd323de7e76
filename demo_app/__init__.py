"""The demo: a small shop, tuned, measured by fastapi-headroom."""
