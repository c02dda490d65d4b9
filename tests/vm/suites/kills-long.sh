# about: 300 kills of bind and release, from NT_VM_SEED
# long
# drive: kill random:16 serial=KILL0001
# drive: calm random:16 serial=CALM0001
# unchanged: kill calm
# files: tests/vm/suites/kills.sh
# timeout: 3600
kills=300
. /root/files/kills.sh
