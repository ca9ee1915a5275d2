"""Rows of any source and format -> examples with lazy images -> prompts."""
