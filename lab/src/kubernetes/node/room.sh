# The first process of a real node's own namespaces: makes the node's places, then runs containerd.
# Everything ends with this process, the containers too, since it is the first of its pid namespace.
#
# usage: room.sh DIRECTORY CONTAINERD      in new mount, pid and cgroup namespaces
set -eu
directory=$1
containerd=$2

mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
for place in lib log; do
  mkdir -p "$directory/$place"
  mount --bind "$directory/$place" "/var/$place"
done

# What kubelet and runc see of the cgroups begins where this process stands.
if [ "$(stat -f -c %T /sys/fs/cgroup)" = sysfs ]; then
  mount -t tmpfs tmpfs /sys/fs/cgroup
fi
while IFS=: read -r number controllers path; do
  case $number:$controllers in
    0:)
      # Without version 1 beside it, this is the only one. Processes are to stand in its leaves.
      [ "$(wc -l </proc/self/cgroup)" = 1 ] || continue
      mount -t cgroup2 cgroup2 /sys/fs/cgroup
      mkdir /sys/fs/cgroup/node
      echo $$ >/sys/fs/cgroup/node/cgroup.procs
      ;;
    *)
      mkdir "/sys/fs/cgroup/${controllers#name=}"
      mount -t cgroup -o "$controllers" cgroup "/sys/fs/cgroup/${controllers#name=}"
      ;;
  esac
done </proc/self/cgroup

# kubelet sets these, and they are the whole machine's: it gets files of its own to write to.
for tunable in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  own=$directory/${tunable##*/}
  cat "/proc/sys/$tunable" >"$own"
  mount --bind "$own" "/proc/sys/$tunable"
done

"$containerd" --config "$directory/containerd.toml" &
wait
