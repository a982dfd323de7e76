"""What the pack uses of grafana-foundation-sdk, imported without its deprecation warnings.

The warnings are about the schema of Grafana 13; classic boards are what Grafana 10 to 12 provision. They are raised
when a module is first imported, so every import of the SDK goes through here.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders import (
        bargauge,
        common,
        dashboard,
        heatmap,
        prometheus,
        stat,
        table,
        timeseries,
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common as common_model
    from grafana_foundation_sdk.models import dashboard as dashboard_model
    from grafana_foundation_sdk.models import heatmap as heatmap_model
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

__all__ = [
    "JSONEncoder",
    "PromQueryFormat",
    "bargauge",
    "common",
    "common_model",
    "dashboard",
    "dashboard_model",
    "heatmap",
    "heatmap_model",
    "prometheus",
    "stat",
    "table",
    "timeseries",
]
