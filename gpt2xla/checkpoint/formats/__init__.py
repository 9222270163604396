"""The files that hold a GPT-2: Hugging Face folders, torch.save files and llm.c's."""
