"""The evaluate stage, which scores a run's frozen encoder beside baselines."""
