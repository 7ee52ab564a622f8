"""The frozen CLIP model: loading through open_clip, prompt encoding, image features."""
