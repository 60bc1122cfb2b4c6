//! Every sort of answer to a container, over both families and both transports.

use world::{Space, World, wait_for};

use crate::cluster::{Cluster, DUAL};
use crate::names::{dig, service};

crate::tests![every_answer_is_given_over_both_families_and_transports];

fn every_answer_is_given_over_both_families_and_transports(world: &World) {
    let cluster = Cluster::new(world, 1);
    let n1 = cluster.n1();
    n1.ok(&format!("network create shop {DUAL}"));
    let a = n1.attach_with("shop", "a", "--alias www");
    let web = service(n1, "web", "vip", &["shop"]);
    n1.ok("service update web --port http=80:8080");
    n1.ok("service create db --network shop --replicas 2 --port sql=5432:5433 --endpoint-mode dnsrr");
    n1.attach_with("shop", "w1", "--service web");
    n1.attach_with("shop", "d1", "--service db");
    n1.attach_with("shop", "d2", "--service db");
    let longest = "x".repeat(63);
    n1.attach("shop", &longest);
    let of = |name: &str, family: usize| n1.addresses("shop", name)[family].clone();
    let both = |family| {
        let mut all = vec![of("d1", family), of("d2", family)];
        all.sort();
        all
    };
    let sql = ["d1", "d2"].map(|name| format!("0 0 5433 {name}.shop.netctl.internal."));
    let expected = [
        ("web A".to_owned(), vec![web[0].clone()]),
        ("WEB.Shop.netctl.internal AAAA".to_owned(), vec![web[1].clone()]),
        ("tasks.web A".to_owned(), vec![of("w1", 0)]),
        ("tasks.web.shop AAAA".to_owned(), vec![of("w1", 1)]),
        ("db A".to_owned(), both(0)),
        ("tasks.db.shop.netctl.internal AAAA".to_owned(), both(1)),
        ("a.shop A".to_owned(), vec![of("a", 0)]),
        ("www AAAA".to_owned(), vec![of("a", 1)]),
        (format!("{longest} A"), vec![of(&longest, 0)]),
        (format!("{longest}.shop.netctl.internal AAAA"), vec![of(&longest, 1)]),
        ("gateway A".to_owned(), vec!["10.9.0.1".to_owned()]),
        ("_http._tcp.web SRV".to_owned(), vec!["0 0 80 web.shop.netctl.internal.".to_owned()]),
        ("_sql._tcp.db.shop SRV".to_owned(), sql.to_vec()),
        (format!("-x {}", of("a", 0)), vec!["a.shop.netctl.internal.".to_owned()]),
        (format!("-x {}", web[1]), vec!["web.shop.netctl.internal.".to_owned()]),
        // It exists, and has nothing of that type.
        ("_http._tcp.web A".to_owned(), vec![]),
    ];
    wait_for("all is known", || {
        expected
            .iter()
            .all(|(question, answers)| dig(&a.space, "10.9.0.1", question).answers == *answers)
    });
    for server in ["10.9.0.1", "fd00:9::1", "169.254.53.53"] {
        for way in ["+notcp", "+tcp"] {
            for (question, answers) in &expected {
                let dug = dig(&a.space, server, &format!("{question} {way}"));
                assert_eq!(
                    (dug.status.as_str(), &dug.answers),
                    ("NOERROR", answers),
                    "{server} {}",
                    dug.text
                );
                assert!(dug.flags.starts_with("qr aa rd ra"), "{server} {}", dug.text);
            }
            nothing_is_told_and_why(&a.space, server, way);
        }
    }
}

/// Of names that there are not, types that a name has not, and what is refused.
fn nothing_is_told_and_why(from: &Space, server: &str, way: &str) {
    let ask = |question: &str| dig(from, server, &format!("{question} {way} +authority"));
    for (question, status) in [("none.shop.netctl.internal A", "NXDOMAIN"), ("a TXT", "NOERROR")] {
        let dug = ask(question);
        assert_eq!((dug.status.as_str(), dug.answers.len()), (status, 1), "{server} {}", dug.text);
        assert!(dug.text.contains("hostmaster.netctl.internal."), "for how long: {}", dug.text);
    }
    let dug = ask("a ANY");
    assert_eq!((dug.status.as_str(), dug.answers.len()), ("REFUSED", 0), "{server} {}", dug.text);
    let dug = ask("shop.netctl.internal AXFR");
    assert!(dug.answers.is_empty(), "{server} {}", dug.text);
}
