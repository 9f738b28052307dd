"""Files of text, conversations or ids, wherever they lie: documents, and the rows that are cut from them."""
