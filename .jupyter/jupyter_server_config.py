"Notebooks are saved as nbdev_clean leaves them: who only reads and runs changes no metadata."
from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821  (Jupyter hands `c` in)
