from google.colab import note


def mount(mountpoint, force_remount=False):
    note("drive.mount", mountpoint)
