"""What runs inside the vLLM server's process: `tutelage_vllm_worker`, imported there by name, never from here."""
