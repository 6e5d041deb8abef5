"""The same from Python: `python examples/four_lines.py`."""

import tutelage

result = tutelage.train("examples/rejection_sampling_own_verifier.yaml", run_dir="runs/four_lines")
print("before", result["before"]["pass@1"], "after", result["after"]["pass@1"])
print("gain", result["gain"]["value"], "95%", result["gain"]["ci95"])
