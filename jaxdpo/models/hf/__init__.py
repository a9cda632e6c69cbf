"""Everything that knows Hugging Face's files: config.json, tensor names, safetensors, PEFT, the hub."""
