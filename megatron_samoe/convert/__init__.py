"""Models as files of several families, read and written tensor by tensor."""
