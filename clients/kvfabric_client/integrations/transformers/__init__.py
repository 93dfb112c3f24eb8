"""transformers on the fabric: prefixes that one process stores and another restores, and models
that decode while their KV lies on fabric nodes.

What every model here shares is `identity`; the two uses know nothing of each other.
"""

from kvfabric_client.integrations.transformers.cache import FabricCache, fabric_attention
from kvfabric_client.integrations.transformers.identity import (
    model_fingerprint,
    model_format,
    model_namespace,
)
from kvfabric_client.integrations.transformers.prefixes import PrefixStore

__all__ = [
    "FabricCache",
    "PrefixStore",
    "fabric_attention",
    "model_fingerprint",
    "model_format",
    "model_namespace",
]
