// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What the kernel drops, and why, while somebody watches. It is the only program that looks into structures of the
// kernel's own: where their fields lie it is told when it is loaded (BTF).
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <stdbool.h>
#include <stddef.h>

#define OF_KERNEL __attribute__((preserve_access_index))

struct ns_common {
    __u32 inum;
} OF_KERNEL;

struct net {
    struct ns_common ns;
} OF_KERNEL;

typedef struct {
    struct net *net;
} OF_KERNEL possible_net_t;

struct net_device {
    __u32 ifindex;
    possible_net_t nd_net;
} OF_KERNEL;

struct sk_buff {
    struct net_device *dev;
    __u32 skb_iif;
    unsigned char *head;
    __u32 tail;
    __u16 network_header;
    __be16 protocol;
} OF_KERNEL;

// How much of a packet is told: headers of IPv6 with extensions, and the ports.
#define TOLD 128
// How much waits for who watches.
#define WAITING (1 << 18)

// A packet that was dropped.
struct drop {
    // When, in nanoseconds of CLOCK_MONOTONIC.
    __u64 time;
    // The inode of the namespace where it was, the device that it was at, and that by which it had come there.
    __u32 namespace;
    __u32 interface;
    __u32 input;
    __u32 zero;
    // `enum skb_drop_reason`.
    __u32 reason;
    // How much of it follows.
    __u32 length;
    __u8 packet[TOLD];
};

// The namespaces that are watched, by their inodes; 1: of the host's only what comes or goes by a device in `devices`,
// and what is in the tunnel.
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1 << 16);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, __u32);
} places SEC(".maps");

// The host's devices that are ours.
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1 << 17);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, __u32);
    __type(value, __u32);
} devices SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, WAITING);
} drops SEC(".maps");

// How many had no room.
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1);
    __type(key, __u32);
    __type(value, __u64);
} lost SEC(".maps");

// The port of the tunnel: it is set when the program is loaded.
const volatile __u32 port = 0;

// Whether a packet is for a tunnel's end.
static __always_inline bool is_in_tunnel(const struct sk_buff *skb) {
    const __u8 *packet = skb->head + skb->network_header;
    __u8 protocol = 0, first = 0;
    __be16 to = 0;
    bool ipv4 = skb->protocol == bpf_htons(ETH_P_IP);
    if (bpf_probe_read_kernel(&first, sizeof first, packet))
        return false;
    __u32 at = ipv4 ? (first & 0xf) * 4 : sizeof(struct ipv6hdr);
    __u32 field = ipv4 ? offsetof(struct iphdr, protocol) : offsetof(struct ipv6hdr, nexthdr);
    return !bpf_probe_read_kernel(&protocol, sizeof protocol, packet + field) && protocol == IPPROTO_UDP &&
           !bpf_probe_read_kernel(&to, sizeof to, packet + at + offsetof(struct udphdr, dest)) &&
           to == (__be16)port;
}

// Arguments of the tracepoint: the packet, where in the kernel's code it was dropped, and why
// (include/trace/events/skb.h).
SEC("tp_btf/kfree_skb")
int netctl_drops(__u64 *arguments) {
    struct sk_buff *skb = (struct sk_buff *)arguments[0];
    struct net_device *device = skb->dev;
    if (!device || (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
        return 0;
    __u32 namespace = device->nd_net.net->ns.inum, interface = device->ifindex, input = skb->skb_iif;
    __u32 *is_host = bpf_map_lookup_elem(&places, &namespace);
    // The host drops packets of its own, too: a flood of them hides none of ours.
    if (!is_host || (*is_host && !bpf_map_lookup_elem(&devices, &interface) &&
                     !bpf_map_lookup_elem(&devices, &input) && !is_in_tunnel(skb)))
        return 0;
    struct drop *drop = bpf_ringbuf_reserve(&drops, sizeof *drop, 0);
    if (!drop) {
        __u32 zero = 0;
        __u64 *count = bpf_map_lookup_elem(&lost, &zero);
        if (count)
            __sync_fetch_and_add(count, 1);
        return 0;
    }
    drop->time = bpf_ktime_get_ns();
    drop->namespace = namespace;
    drop->interface = interface;
    drop->input = input;
    drop->zero = 0;
    drop->reason = arguments[2];
    // What does not lie in one piece ends here.
    __u32 begin = skb->network_header, end = skb->tail;
    __u32 length = end > begin ? end - begin : 0;
    drop->length = length > TOLD ? TOLD : length;
    if (bpf_probe_read_kernel(drop->packet, sizeof drop->packet, skb->head + begin))
        drop->length = 0;
    bpf_ringbuf_submit(drop, 0);
    return 0;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
