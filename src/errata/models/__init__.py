"""Architectures that no library maintains, each as a Hugging Face model: one file for each. Nothing here imports another room of ours.

Importing a file registers its architecture, so that `AutoModelForCausalLM.from_pretrained` knows it; `hosts.load` does that itself.
"""
