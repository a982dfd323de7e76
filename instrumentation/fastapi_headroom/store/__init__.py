"""The store: what workers write, what readers merge. See ``writer`` and ``reader``."""
