"""Experts that layers come to share: one fit, which surgery (of weights alone) and compression (by what experts meet) call."""
