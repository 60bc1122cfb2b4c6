// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What leaves a sandbox in the tunnel, where it enters the host's namespace: the host's routes and neighbours
// say by which device it goes on.
#include "report.h"
#include "tunnel.h"

#define AF_INET 2
#define AF_INET6 10

// By which way of the host's a node is reached. Flows are spread over several.
struct hop_key {
    struct address remote;
    __u32 spread;
    __u32 zero;
};

struct hop {
    // When the host's routes are asked again, in ticks.
    __u64 until;
    __u32 interface;
    __u32 family;
    __be32 neighbour[4];
    // The Ethernet addresses of the neighbour and of the device; 0: the kernel does not know the neighbour.
    struct mac destination;
    struct mac source;
    __u32 zero;
};

// What the host's routes have said. No agent looks at it, so it lives as long as the program.
struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 1 << 13);
    __type(key, struct hop_key);
    __type(value, struct hop);
} hops SEC(".maps");

// Asks the host's routes by which way a node is reached from this device.
static __always_inline int
ask_routes(struct __sk_buff *skb, const struct hop_key *key, const struct address *local, struct hop *hop) {
    struct bpf_fib_lookup route = {
        .ifindex = skb->ifindex,
        .l4_protocol = IPPROTO_UDP,
        // All flows that share the answer ask alike.
        .sport = bpf_htons(TUNNEL_PORTS | key->spread),
        // The length is not compared with the MTU: that was done where the packet entered the tunnel.
        .tot_len = 1,
    };
    if (is_mapped(&key->remote)) {
        route.family = AF_INET;
        route.ipv4_src = local->words[3];
        route.ipv4_dst = key->remote.words[3];
    } else {
        route.family = AF_INET6;
        __builtin_memcpy(route.ipv6_src, local, sizeof route.ipv6_src);
        __builtin_memcpy(route.ipv6_dst, &key->remote, sizeof route.ipv6_dst);
    }
    long result = bpf_fib_lookup(skb, &route, sizeof route, 0);
    if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
        return -1;
    *hop = (struct hop){
        .until = bpf_jiffies64() + HOLDS,
        .interface = route.ifindex,
        .family = route.family,
    };
    __builtin_memcpy(hop->neighbour, route.ipv6_dst, sizeof hop->neighbour);
    if (result == BPF_FIB_LKUP_RET_SUCCESS) {
        __builtin_memcpy(&hop->destination, route.dmac, sizeof hop->destination);
        __builtin_memcpy(&hop->source, route.smac, sizeof hop->source);
    }
    return 0;
}

static __always_inline int read_ends(struct __sk_buff *skb, struct hop_key *key, struct address *local) {
    if (skb->protocol == bpf_htons(ETH_P_IP)) {
        struct {
            struct iphdr ip;
            struct ports ports;
        } outer;
        if (load(skb, ETH_HLEN, &outer, sizeof outer))
            return -1;
        map_ipv4(&key->remote, outer.ip.daddr);
        map_ipv4(local, outer.ip.saddr);
        key->spread = bpf_ntohs(outer.ports.source) % SPREAD;
        return 0;
    }
    struct {
        struct ipv6hdr ip;
        struct ports ports;
    } outer;
    if (load(skb, ETH_HLEN, &outer, sizeof outer))
        return -1;
    copy_ipv6(&key->remote, &outer.ip.daddr);
    copy_ipv6(local, &outer.ip.saddr);
    key->spread = bpf_ntohs(outer.ports.source) % SPREAD;
    return 0;
}

// Shows the packet in the tunnel, for which the host has no way.
static __always_inline void report_lost(struct __sk_buff *skb, const struct hop_key *key) {
    struct packet packet = {};
    struct {
        __be32 number;
        struct frame frame;
    } __attribute__((packed)) inner;
    if (!wanted())
        return;
    // Behind the header of UDP, and the first half of that of VXLAN, whose second has the number in its upper
    // bits (RFC 7348, 5).
    __u32 at = ETH_HLEN + (is_mapped(&key->remote) ? sizeof(struct iphdr) : sizeof(struct ipv6hdr)) +
               sizeof(struct udphdr) + sizeof inner.number;
    if (load(skb, at, &inner, sizeof inner))
        return;
    at += sizeof inner;
    packet.tuple.network = bpf_ntohl(inner.number) >> 8;
    if (read_addresses(skb, &packet, inner.frame.protocol, at))
        return;
    packet.reason = EVENT_NO_ROUTE + 1;
    end_report(begin_report(skb, &packet, POINT_TO_WIRE, at), &packet, TC_ACT_SHOT);
}

// Has the next packets of a flow leave by this way without asking for it.
static __always_inline void note_exit(struct flow *flow, const struct hop *hop) {
    const struct mac none = {};
    if (same_mac(&hop->destination, &none))
        return;
    flow->exit = (struct exit){hop->until, hop->interface, hop->destination, hop->source};
}

// Whether a packet of a flow can leave as the last ones did: its frame has the addresses for that. Another could have
// come between, or the program that has written it may know of other flows.
static __always_inline bool is_addressed(struct __sk_buff *skb, const struct flow *flow) {
    struct frame frame;
    return holds(flow->exit.until) && !load(skb, 0, &frame, sizeof frame) &&
           same_mac(&frame.destination, &flow->exit.destination) &&
           same_mac(&frame.source, &flow->exit.source);
}

SEC("classifier")
int netctl_wire_out(struct __sk_buff *skb) {
    struct hop_key key = {};
    struct address local;
    struct hop new;
    __u32 place = skb->mark - 1;
    struct flow *flow = bpf_map_lookup_elem(&flows, &place);
    skb->mark = 0;
    if (flow && is_addressed(skb, flow))
        return bpf_redirect(flow->exit.interface, 0);
    if (read_ends(skb, &key, &local))
        return TC_ACT_SHOT;
    struct hop *hop = bpf_map_lookup_elem(&hops, &key);
    if (!hop || !holds(hop->until)) {
        if (ask_routes(skb, &key, &local, &new)) {
            note(EVENT_NO_ROUTE);
            report_lost(skb, &key);
            return TC_ACT_SHOT;
        }
        bpf_map_update_elem(&hops, &key, &new, BPF_ANY);
        hop = &new;
    }
    if (flow)
        note_exit(flow, hop);
    struct bpf_redir_neigh next = {.nh_family = hop->family};
    __builtin_memcpy(next.ipv6_nh, hop->neighbour, sizeof next.ipv6_nh);
    // The kernel asks for a neighbour that it does not know, and keeps those alive that it does.
    return bpf_redirect_neigh(hop->interface, &next, sizeof next, 0);
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
