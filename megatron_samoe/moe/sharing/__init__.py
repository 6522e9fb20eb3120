"""Ways in which MoE layers come by their experts: `way.py` says what a way is, each other file is one or a part of one."""
