"""Read files of features that other tools wrote: one module a form, all as rows of vectors."""
