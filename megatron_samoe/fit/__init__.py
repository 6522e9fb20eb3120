"""The fit of shared experts to layers' own, which surgery (by weights only) and compression (by experts' inputs) call."""
