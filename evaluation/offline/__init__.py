"""Everything that a comparison needs on a machine without a network: packed here into parts, unpacked there."""
