"""Extra methods of the vLLM server's workers (`--worker-extension-cls tutelage_vllm_worker.Extension`).

It is imported by the server's interpreter, from this folder alone, so it needs nothing of this library.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Extension:
    """Mixed into vLLM's worker; `self` is the worker."""

    model_runner: Any

    def tutelage_load(self, folder: str) -> dict[str, Any]:
        """Load the weights in `folder`, in place. Returns what was missing; `error` where nothing was touched.

        vLLM's own reload leaves two things to the caller. Weights that the folder lacks stay as they were, with a line
        in the log: here they are reported. And a tied output layer is not loaded, so on CPU, where it holds its own
        packed copy of the weights, it goes on answering with the old ones: here it is packed again.
        """
        if not any(Path(folder).glob("*.safetensors")):
            return {"error": f"the server sees no safetensors in {folder}: the folder must be on a disk both can read"}
        model = self.model_runner.get_model()
        wanted = {name for name, _ in model.named_parameters()}
        loaded: set[str] = set()
        load = model.load_weights

        def keep_names(weights: Iterable[Any]) -> Any:
            names = load(weights)
            loaded.update(names or wanted)
            return names

        model.load_weights = keep_names
        try:
            self.model_runner.reload_weights(weights_path=folder)
        finally:
            del model.load_weights
        return {"missing": sorted(wanted - loaded), "repacked": self._repack_tied(model)}

    def _repack_tied(self, model: Any) -> list[str]:
        """Names of the layers that share their weight with another one and were packed anew."""
        sharing: dict[int, list[tuple[str, Any]]] = {}
        for name, layer in model.named_modules():
            weight = layer._parameters.get("weight")
            if weight is not None and weight.numel() > 0:
                sharing.setdefault(id(weight), []).append((name, layer))
        done = []
        for group in sharing.values():
            for name, layer in group if len(group) > 1 else []:
                if hasattr(layer, "cpu_linear"):
                    layer.quant_method.process_weights_after_loading(layer)
                    done.append(name)
        return done
