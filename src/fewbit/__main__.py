from fewbit.cli import main

main()
