"""Boards, alert rules and runbooks, built from the catalog that the probes write."""
