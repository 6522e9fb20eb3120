"""From a trained MoE to one whose layers share experts: calibrate, match, fit, heal, judge (docs/compression.md)."""
