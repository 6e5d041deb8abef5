"""Watching a run: entropy and novelty, the regression gate, the graduation verdict, the gap diagnosis."""
