"""Traces by OpenTelemetry: set up when they are asked for, free of cost otherwise."""
