// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a container gets, where it leaves its sandbox: answers of backends come from the service.
// Everything else goes on as it is.
#include "icmp.h"
#include "rewrite.h"

SEC("classifier")
int netctl_to(struct __sk_buff *skb) {
    struct packet packet = {};
    struct tuple other;
    struct counts *counted;
    if (read_addresses(skb, &packet))
        return PASS;
    if (is_error(&packet))
        return translate_error(skb, &packet, 1);
    if (read_ports(skb, &packet))
        return PASS;
    packet.tuple.reply = 1;
    struct connection *connection = find(&packet.tuple, &other, &counted);
    if (!connection || connection->loops)
        return PASS;
    remember_fragment(skb, &packet);
    counted->outgoing_packets += 1;
    counted->outgoing_bytes += skb->len - ETH_HLEN;
    follow(connection, &other, &packet);
    return rewrite(skb, &packet, connection) ? TC_ACT_SHOT : PASS;
}

const char LICENSE[] SEC("license") = "Dual MIT/GPL";
