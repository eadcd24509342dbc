"""What every wing needs: settings, errors, names, files, locks; nothing of ours but `aegan`."""
