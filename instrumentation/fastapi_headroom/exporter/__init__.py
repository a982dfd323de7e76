"""The exporter: from the store's files to Prometheus, in a sidecar process or in one elected worker's thread."""
