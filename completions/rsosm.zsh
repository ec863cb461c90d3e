
#compdef rsosm

_rsosm_completion() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _RSOSM_COMPLETE=complete_zsh rsosm)
}

compdef _rsosm_completion rsosm

