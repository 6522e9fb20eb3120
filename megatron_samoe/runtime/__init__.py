"""What every program that runs a model needs: joining ranks, and loading a model for use."""
