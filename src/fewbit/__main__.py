from fewbit.cli.app import main

main()
