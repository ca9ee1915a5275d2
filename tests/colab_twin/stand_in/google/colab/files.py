from google.colab import note


def download(filename):
    note("files.download", filename)
