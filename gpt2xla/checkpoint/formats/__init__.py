"""File formats that hold a GPT-2: Hugging Face folders, and files of torch.save and llm.c."""
